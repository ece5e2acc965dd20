"""Build lowbitq._core: one extension, and one set of objects per instruction set."""

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

ROOT = Path(__file__).parent
CSRC = Path("csrc")

# Each folder of csrc/kernels is compiled with these flags and nothing else gets any. The
# portable folder gets none: it must run on every x86-64 and every other machine.
ISA_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c -mbmi2",
    "avx512": "-mavx2 -mfma -mf16c -mbmi2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni",
}
X86_ONLY = {"avx2", "avx512"}

# -ffp-contract=off: products and sums round where the source says so, hence alike on every ISA.
# -fno-trapping-math: results stay as they are, but nobody reads the exception flags, for whose sake
# gcc would keep branches in loops that can be vectors.
# -ftls-model=initial-exec: thread-local variables come with the stack of a thread. Those that the
# loader makes later end the process where it finds no memory for them.
FLAGS = [
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-ftls-model=initial-exec",
]
FLAGS += ["-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Wmissing-prototypes", "-Wvla"]
DEFINES = [
    ("Py_LIMITED_API", "0x030A0000"),
    ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
    ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"),
]


def blas():
    """Include folders, library folders, libraries, defines of OpenBLAS: PyPI's, or the system's."""
    if os.environ.get("LOWBITQ_BLAS") == "system":
        words = subprocess.check_output(["pkg-config", "--cflags", "--libs", "openblas"], text=True)
        flags = {p: [w[2:] for w in words.split() if w[:2] == p] for p in ("-I", "-L", "-l")}
        return flags["-I"], flags["-L"], flags["-l"], [("LBQ_BLAS_PREFIX", "")]
    import scipy_openblas32 as openblas

    prefix = [("LBQ_BLAS_PREFIX", "scipy_")]
    return [openblas.get_include_dir()], [openblas.get_lib_dir()], [openblas.get_library()], prefix


def check_tools(compiler):
    """Raise an error of one line if there is no compiler, or no header of Python."""
    if shutil.which(compiler) is None:
        raise PlatformError(
            f"lowbitq is written in C, and there is no C compiler {compiler!r} here: install one "
            "(apt install gcc, dnf install gcc), or name another in the variable CC"
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise PlatformError(
            f"Python.h is not in {sysconfig.get_path('include')}: install the headers of this "
            "Python (apt install python3-dev, dnf install python3-devel)"
        )


class BuildExt(build_ext):
    """Compiles every C file once, in parallel, skipping what is newer than all it could include."""

    def build_extension(self, ext):
        check_tools(self.compiler.compiler_so[0])
        sanitize = os.environ.get("LOWBITQ_SANITIZE")
        # -g0: Python's own flags have -g, which makes the module nine times as large.
        # -O1: under sanitizers gcc 12 takes minutes over the unrolled kernels at -O3.
        extra = ["-O1", "-g", "-fno-omit-frame-pointer"] if sanitize else ["-g0"]
        extra += [f"-fsanitize={sanitize}"] if sanitize else []
        headers = max(p.stat().st_mtime for p in [*CSRC.rglob("*.h"), Path(__file__)])
        x86 = os.uname().machine in ("x86_64", "AMD64")
        macros = DEFINES + ext.define_macros + [("LBQ_X86", "1")] * x86
        macros += [("LBQ_SANITIZE" if sanitize else "NDEBUG", "1")]
        temp = Path(self.build_temp) / (sanitize or "plain").replace(",", "-")

        def compile_one(source):
            isa = source.parts[2] if source.parts[1] == "kernels" and len(source.parts) > 3 else ""
            if isa in X86_ONLY and not x86:
                return None
            target = temp / source.with_suffix(".o")
            newest = max(source.stat().st_mtime, headers)
            if self.force or not target.exists() or target.stat().st_mtime < newest:
                flags = FLAGS + ISA_FLAGS.get(isa, "").split() + extra
                includes = [str(CSRC), numpy.get_include(), *ext.include_dirs]
                self.compiler.compile(
                    [str(source)],
                    output_dir=str(temp),
                    macros=macros,
                    include_dirs=includes,
                    extra_postargs=flags,
                )
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for o in pool.map(compile_one, map(Path, ext.sources)) if o]
        # Where this machine has Python's library, which a module of the stable ABI does not need.
        own = {
            w for w in sysconfig.get_config_var("LDSHARED").split() if w.startswith("-Wl,-rpath")
        }
        self.compiler.linker_so = [word for word in self.compiler.linker_so if word not in own]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=[*ext.libraries, "m", "pthread"],
            library_dirs=ext.library_dirs,
            extra_postargs=extra,
            build_temp=str(temp),
            target_lang="c",
        )


os.chdir(ROOT)
include_dirs, library_dirs, libraries, blas_defines = blas()
core = Extension(
    "lowbitq._core",
    sorted(str(p) for p in CSRC.rglob("*.c")),
    depends=sorted(str(p) for p in CSRC.rglob("*.h")),
    include_dirs=include_dirs,
    library_dirs=library_dirs,
    libraries=libraries,
    define_macros=blas_defines,
    py_limited_api=True,
)
setup(ext_modules=[core], cmdclass={"build_ext": BuildExt})

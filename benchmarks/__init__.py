"""Measurements; each file runs with python -m benchmarks.bench_SUBJECT.

What OpenBLAS reads from the environment has to be there before NumPy is imported, so it is set
here: NumPy's copy gets the threads of --threads, 1 unless said, and with --isa avx2 neither NumPy's
nor lowbitq's uses AVX-512.
"""

import argparse
import os

_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_parser.add_argument("--threads", default="1")
_parser.add_argument("--isa")
_options, _ = _parser.parse_known_args()

os.environ["OPENBLAS_NUM_THREADS"] = _options.threads
if _options.isa == "avx2":
    os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")

"""Measurements; run a file with python -m benchmarks.bench_SUBJECT.

OpenBLAS reads the environment when NumPy is imported, so it is set here: NumPy's copy gets the
threads of --threads (default 1), and with --isa avx2 neither NumPy's nor lowbitq's copy uses
AVX-512.
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

"""The benchmarks, one file per question: `python -m difflt_core.benchmarks NAME`."""

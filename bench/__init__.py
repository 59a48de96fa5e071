"""The bench: LMX beside its own engine in-process and beside other servers. `python -m bench --help`."""

"""Where the ranks of a run go: hosts, their slots, this host's devices. `python -m launch.places` is for launchers."""

"""Decides and remembers: starts, watches and replaces the gateway and the workers. No MLX, no ZeroMQ, no HTTP."""

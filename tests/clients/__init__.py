"""Real clients, each in an environment of its own, against a real LMX. Run by `make clients`."""

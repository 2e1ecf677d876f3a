"""The demonstration: the whole recipe on a tiny model and generated data, in minutes on a CPU."""

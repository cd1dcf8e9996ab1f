"""The embedded default of `align tutorial`: a tiny model, its task, and the first real model after it."""

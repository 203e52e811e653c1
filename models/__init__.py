"""Models that ship with safelight. One folder a model; importing this package loads nothing."""

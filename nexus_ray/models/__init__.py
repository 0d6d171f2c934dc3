"""Models: built from a config, scored on packed rows, sampled from, and exported for plain `transformers`."""

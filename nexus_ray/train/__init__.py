"""A stage: schedule and losses (pure), DeepSpeed engine, checkpoints, the worker loop and its launch on Ray Train."""

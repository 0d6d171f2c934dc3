"""Writing text with models: generators, prompts, filters, validators, and the ledger that loses and repeats nothing."""

"""Corpora: sources -> documents -> token shards, each built once, with a manifest written last."""

"""Text in, lists of token ids out; triples, evaluation tasks, and tables in JSON."""

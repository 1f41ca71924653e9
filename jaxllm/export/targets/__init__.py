"""One file for each target of an export: it has a `TARGET`, see `jaxllm.export.target`."""

"""One file for each command of `jaxllm`: its arguments, and `run`."""

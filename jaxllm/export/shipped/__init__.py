"""Programs that are copied into exported directories. They import nothing of jaxllm."""

"""Every error jaxllm raises about its input. Each message says what was expected, what was found, what to do."""


class JaxllmError(ValueError):
    """Base of all errors about something the caller gave us: a file, a config, a prompt, a shape."""


class ConfigError(JaxllmError):
    """A config.json that does not describe a model jaxllm can run."""


class CheckpointError(JaxllmError):
    """Weights that are missing, malformed, truncated or not those of the config."""


class TokenizerError(JaxllmError):
    """A tokenizer or chat template that is missing, malformed or cannot do what was asked."""


class ContextError(JaxllmError):
    """More tokens than the state holds, and no eviction policy was chosen."""


class SamplerError(JaxllmError):
    """A sampling parameter out of its range or of the wrong shape."""


class Notice(UserWarning):
    """Something the caller may want to know, though it is no error: how many tensors were expanded, say."""


class MissingExtraError(JaxllmError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

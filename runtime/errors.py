"""What can go wrong while an artifact is checked, loaded or asked; each message is one line that says what to do."""


class ServingError(Exception):
    """Base of every error that the runtime raises on purpose."""


class ArtifactError(ServingError):
    """The folder is not an artifact that may be loaded."""


class DigestError(ArtifactError, ValueError):
    """What an artifact's identity is to be compared with is no identity."""


class SessionError(ServingError):
    """ONNX Runtime is missing, refuses the graph, or the graph does not do what this runtime expects of it."""


class PromptError(ServingError, ValueError):
    """What was asked cannot be turned into tokens, or does not fit into the context."""


class SamplingError(ServingError, ValueError):
    """A sampling parameter is out of range."""


class LoadError(ServingError, ValueError):
    """What is asked of a load generator makes no sense: lengths, limits, an address, a key."""


class SettingsError(ServingError, ValueError):
    """A server cannot be started as it was asked to."""

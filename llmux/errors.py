"""Every error that llmux raises or answers with.

LLMuxError
├── ConfigError                the configuration cannot be used; says where and what to do
├── PolicyLoadError            a policy cannot be loaded
├── StateLockedError           another llmux holds the state file
└── RequestError               a request is refused; ``status`` is the HTTP status
    ├── BadRequestError        400
    ├── UnauthorizedError      401
    ├── ForbiddenError         403
    ├── UnknownModelError      404
    ├── PathRefusedError       404
    ├── MethodNotAllowedError  405
    ├── SlowClientError        408
    ├── ConflictError          409  (admin API)
    ├── CancelledRequestError  410
    ├── BodyTooLargeError      413
    ├── LateModelError         426  (a WebSocket)
    ├── QueueFullError         429
    ├── LimitError             429  (of a key)
    ├── QuotaError             429  (a key's budget)
    ├── TooManyAttemptsError   429  (wrong keys)
    ├── EngineError            502
    ├── RemoteError            502  (of an endpoint on another host)
    │   └── RemoteTimeoutError 504
    ├── UnavailableError       503  (wake failed, backing off, faulted, pinned, leased, stopping)
    └── WaitedTooLongError     504
"""

from __future__ import annotations

from typing import ClassVar

INTERNAL_ERROR = "internal error; see llmux's log"
"""What a client is told of a mistake in llmux itself."""


class LLMuxError(Exception):
    """The root of the tree."""


class ConfigError(LLMuxError):
    """The configuration cannot be used. ``path`` is the place in the file, as ``models.llama.port``."""

    def __init__(self, message: str, *, path: str = "", file: str = "", line: int | None = None) -> None:
        self.message = message
        self.path = path
        self.file = file
        self.line = line
        where = ":".join(str(part) for part in (file, line) if part)
        super().__init__(": ".join(part for part in (where, path, message) if part))


class PolicyLoadError(LLMuxError):
    """A policy cannot be loaded, or refuses its options."""


class StateLockedError(LLMuxError):
    """Another llmux uses the same state file."""


class RequestError(LLMuxError):
    """A request is refused.

    ``status`` is the HTTP status, ``code`` a stable word for programs, ``type`` the word of OpenAI's
    envelope, ``anthropic_type`` that of Anthropic's. ``retry_after`` is in seconds.
    """

    status: int = 500
    type: ClassVar[str] = "server_error"
    anthropic_type: ClassVar[str] = "api_error"
    code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.param = param
        self.retry_after = retry_after


class BadRequestError(RequestError):
    """The request cannot be understood, or names no model."""

    status = 400
    type = "invalid_request_error"
    anthropic_type = "invalid_request_error"
    code = "bad_request"


class UnauthorizedError(RequestError):
    """No key, or a wrong one."""

    status = 401
    type = "authentication_error"
    anthropic_type = "authentication_error"
    code = "invalid_api_key"


class ForbiddenError(RequestError):
    """The caller may not do this."""

    status = 403
    type = "permission_error"
    anthropic_type = "permission_error"
    code = "forbidden"


class UnknownModelError(RequestError):
    """No model of that name."""

    status = 404
    type = "invalid_request_error"
    anthropic_type = "not_found_error"
    code = "model_not_found"


class PathRefusedError(RequestError):
    """The path is not among those that are forwarded."""

    status = 404
    type = "invalid_request_error"
    anthropic_type = "not_found_error"
    code = "path_not_forwarded"


class MethodNotAllowedError(RequestError):
    """One of llmux's own paths does not take this method."""

    status = 405
    type = "invalid_request_error"
    anthropic_type = "invalid_request_error"
    code = "method_not_allowed"


class SlowClientError(RequestError):
    """The client sent nothing for too long."""

    status = 408
    type = "invalid_request_error"
    anthropic_type = "invalid_request_error"
    code = "request_timeout"


class ConflictError(RequestError):
    """An admin command that cannot be carried out now."""

    status = 409
    type = "invalid_request_error"
    anthropic_type = "invalid_request_error"
    code = "conflict"


class CancelledRequestError(RequestError):
    """An operator has cancelled the request."""

    status = 410
    type = "invalid_request_error"
    anthropic_type = "invalid_request_error"
    code = "cancelled"


class BodyTooLargeError(RequestError):
    """The request's body is larger than ``max_body``."""

    status = 413
    type = "invalid_request_error"
    anthropic_type = "request_too_large"
    code = "body_too_large"


class LateModelError(RequestError):
    """A WebSocket that would name its model only in its messages; Codex goes on without one."""

    status = 426
    type = "invalid_request_error"
    anthropic_type = "invalid_request_error"
    code = "model_required"


class QueueFullError(RequestError):
    """``max_queued`` requests already wait for this model."""

    status = 429
    type = "rate_limit_error"
    anthropic_type = "rate_limit_error"
    code = "queue_full"


class TooManyAttemptsError(RequestError):
    """Too many wrong keys were shown; one that is new to llmux is not looked at for now."""

    status = 429
    type = "rate_limit_error"
    anthropic_type = "rate_limit_error"
    code = "too_many_attempts"


class LimitError(RequestError):
    """The key has used what its limits allow for now."""

    status = 429
    type = "rate_limit_error"
    anthropic_type = "rate_limit_error"
    code = "rate_limit_exceeded"


class QuotaError(RequestError):
    """The key's budget is spent, or nearly so and the model is not awake."""

    status = 429
    type = "insufficient_quota"
    anthropic_type = "rate_limit_error"
    code = "insufficient_quota"


class EngineError(RequestError):
    """The engine broke off before its headers."""

    status = 502
    code = "engine_error"


class RemoteError(RequestError):
    """An endpoint on another host cannot be reached, broke off, or refuses llmux's key; ``code`` says which."""

    status = 502
    code = "remote_error"


class RemoteTimeoutError(RemoteError):
    """An endpoint on another host took longer than its `timeouts` allow."""

    status = 504
    type = "timeout_error"
    anthropic_type = "timeout_error"
    code = "remote_timeout"


class UnavailableError(RequestError):
    """The model cannot be served now; ``code`` says why."""

    status = 503
    type = "service_unavailable"
    anthropic_type = "overloaded_error"
    code = "unavailable"


class WaitedTooLongError(RequestError):
    """The request waited longer than ``request_timeout``."""

    status = 504
    type = "timeout_error"
    anthropic_type = "timeout_error"
    code = "request_timeout"

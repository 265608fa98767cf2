"""The errors that a user can mend, as exceptions.

    EdgeError            anything a user can mend; exit code 1, HTTP 500 unless a subclass says more
    ├─ UsageError        the command line or a configuration value; exit code 2
    ├─ InputError        a file, row or folder that cannot be used
    ├─ ExistsError       a result stands where a new one would go, and --overwrite was not given
    ├─ UnavailableError  a device, library or package that is not there
    └─ RequestError      an HTTP request that cannot be honoured; carries status, code and the field

The message says what is wrong and names the file, row, field or value; the hint says what to do.
"""

from __future__ import annotations


class EdgeError(Exception):
    """Something a user can mend. `message` says what, `hint` what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(EdgeError):
    exit_code = 2


class InputError(EdgeError):
    pass


class ExistsError(EdgeError):
    pass


class UnavailableError(EdgeError):
    pass


class RequestError(EdgeError):
    """A request that the server answers with the HTTP status `status` and an error body.

    code: a short machine-readable word. param: the request field. retry_after: seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        param: str | None = None,
        hint: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, hint)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after

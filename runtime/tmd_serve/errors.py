"""What a server refuses: an HTTP status, a sentence, and the names that OpenAI's clients look for."""

from __future__ import annotations

from collections.abc import Mapping

INVALID, NOT_FOUND, FORBIDDEN, BUSY = "invalid_request_error", "not_found_error", "permission_error", "rate_limit_error"
SERVER = "server_error"


class Refusal(Exception):
    """A request that cannot be granted. The message says what, why, and what to do.

    `param` is the field that is at fault, `code` a word for programs; `retry_after`, in seconds, is for requests that
    may come again; `headers` go with the answer.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = "invalid_value",
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)
        self.message, self.status, self.code, self.param = message, status, code, param

    @property
    def type(self) -> str:
        """OpenAI's kind of error."""
        kinds = {401: "authentication_error", 403: FORBIDDEN, 404: NOT_FOUND, 429: BUSY}
        return SERVER if self.status >= 500 else kinds.get(self.status, INVALID)

    def document(self) -> dict[str, dict[str, str | None]]:
        """The body of the answer, in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def not_found(video: str) -> Refusal:
    shown = video if len(video) <= 60 else video[:60] + "..."
    return Refusal(f"there is no video {shown!a}: it never was, was deleted or has expired.", 404, "not_found")

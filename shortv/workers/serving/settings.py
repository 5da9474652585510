"""What an endpoint allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSettings:
    """Who may ask, how much, and for how long.

    `key_digests` are the SHA-256 digests (hex) of accepted API keys; without any, only clients on loopback are
    answered. `max_in_flight` counts the POST requests that one process works on at a time, bodies being read included:
    each may hold about 2.5 times `max_body_bytes`.
    """

    key_digests: tuple[str, ...] = ()
    max_body_bytes: int = 20 * 2**20
    max_image_pixels: int = 64_000_000
    """Of all images of a request together."""
    max_images: int = 16
    max_prompt_chars: int = 1_000_000
    """Of all texts together: far beyond any context, so that nobody tokenizes megabytes in order to refuse them."""
    default_max_tokens: int = 1024
    timeout_s: float = 120.0
    max_in_flight: int = 64
    retry_after_s: int = 1
    sends_request_id: bool = True
    """Whether answers carry `x-request-id`; False behind Ray Serve, whose proxy adds the header itself."""

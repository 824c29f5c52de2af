"""What a client sent is repeated in part only: an error or a log line must not be as long as a request may be."""


def shortened(text: str, most: int = 1000) -> str:
    """`text`, or of a longer one than `most` characters the beginning and the end: names and remedies stand there."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... ({len(text) - 2 * half:,} characters) ... {text[-half:]}"

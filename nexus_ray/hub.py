"""Whether the Hugging Face hub can be reached: asked once, since its own client would retry a dead network for long."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from functools import lru_cache

TIMEOUT_S = 5.0


@lru_cache(maxsize=1)
def hub_answers() -> bool:
    """Whether the hub can be reached at all; False where HF_HUB_OFFLINE forbids to ask."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # it answers; whom to trust is the hub client's own business
    except OSError:
        return False
    return True

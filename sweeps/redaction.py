"""Taking secrets out of text before it is kept or shown: error records, what is printed, what MLflow is told.

The failure it guards against: a library puts the URL that it could not reach, with the password in it, or the header
that was refused, into its error message; a traceback then lies in a store that a whole group reads, and in MLflow.
It is for text that is written once; nothing that runs at every step calls it.
"""

import os
import re

HIDDEN = "***"
SECRET_NAMES = re.compile(r"(?:TOKEN|PASSWORD|PASSWD|SECRET|KEY|CREDENTIALS)$|^AWS_(?!REGION|DEFAULT_REGION|PROFILE)")
"""Environment variables whose values are secrets."""
LEAST_CHARACTERS = 8
"""A shorter value is no secret worth the name, and would be found in many words."""

_PATTERNS = (
    # (what a text with such a secret holds, in small letters; the secret; what is shown): most text is passed over
    (
        ("://",),  # user:password@ and long-token@ of a URL; a password may hold an @ of its own
        re.compile(r"(?<=://)(?:[^\s/:@]*:[^\s/]*|[^\s/:@]{20,})@"),
        f"{HIDDEN}@",
    ),
    (
        ("authorization",),
        re.compile(
            r"""(authorization["']?\s*[:=]\s*["']?)(?:(?:bearer|basic|token|digest)\s+)?[^\s"',;}]+""", re.IGNORECASE
        ),
        rf"\1{HIDDEN}",
    ),
    (("bearer ",), re.compile(r"\b(bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (
        ("token=", "key=", "password=", "secret=", "sig=", "signature=", "x-amz-"),
        re.compile(
            r"([?&](?:access_token|token|api_?key|password|secret|sig|signature|x-amz-[a-z-]+)=)[^&\s\"'#]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (
        ("aws_se",),
        re.compile(r"(aws_secret_access_key|aws_session_token)(\W{1,4})[\w/+=]{16,}", re.IGNORECASE),
        rf"\1\2{HIDDEN}",
    ),
    (("akia", "asia"), re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), HIDDEN),
    (
        ("hf_", "gh", "github_pat_", "glpat-", "sk-"),
        re.compile(r"\b(?:hf_|ghp_|gho_|ghs_|github_pat_|glpat-|sk-)[A-Za-z0-9_-]{16,}"),
        HIDDEN,
    ),
    (
        ("private key-----",),
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
        HIDDEN,
    ),
)


def redact(text: str) -> str:
    """The text with `***` for every secret in it: values of this process's environment whose names say that they are
    secrets (RAY_AUTH_TOKEN, MLFLOW_TRACKING_PASSWORD, HF_TOKEN, AWS_..., ..._KEY), passwords in URLs, Authorization
    headers, tokens in queries, and keys whose form is known."""
    secrets = {os.environ[name].strip() for name in list(os.environ) if SECRET_NAMES.search(name)}
    for secret in sorted(secrets, key=len, reverse=True):  # one may begin with another
        if len(secret) >= LEAST_CHARACTERS:
            text = text.replace(secret, HIDDEN)
    small = text.lower()
    for signs, pattern, shown in _PATTERNS:
        if any(sign in small for sign in signs):
            text = pattern.sub(shown, text)
    return text

"""The Dockerfile: not root, no index, no secret, and only what the builder is given."""

import fnmatch
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "cluster" / "Dockerfile").read_text()).replace("\\\n", " ")
DOCKERFILE = [line.split(None, 1) for line in TEXT.splitlines() if line.strip()]


def arguments(name: str) -> list[str]:
    return [rest for found, rest in DOCKERFILE if found == name]


def sent(path: str) -> bool:
    """Whether .dockerignore lets a path through to the builder: the last line that matches it or a parent decides."""
    parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    allowed = True
    for pattern in (ROOT / ".dockerignore").read_text().split("\n"):
        rule = pattern.strip().removeprefix("!")
        names = parents + [name for name in Path(path).parts if rule.startswith("**/")]
        if rule and not rule.startswith("#") and any(fnmatch.fnmatch(name, rule.removeprefix("**/")) for name in names):
            allowed = pattern.startswith("!")
    return allowed


def test_it_runs_as_another_user_without_a_network() -> None:
    assert DOCKERFILE[-1][0] in ("CMD", "ENTRYPOINT")
    user = arguments("USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"--uid {user.partition(':')[0]} " in " ".join(arguments("RUN"))
    variables = dict(pair.split("=", 1) for rest in arguments("ENV") for pair in rest.split())
    assert variables["HF_HUB_OFFLINE"] == "1" and variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert arguments("VOLUME") == [variables["HF_HOME"]]


def test_packages_come_by_hash_from_the_configured_index_and_no_secret_enters_a_layer() -> None:
    installs = [part for rest in arguments("RUN") for part in rest.split("&&") if " install" in part and "pip" in part]
    assert len(installs) == 3 and "requirements.lock" in installs[1]
    assert all("--require-hashes" in part or "--no-index" in part for part in installs)
    everything = "\n".join(rest for _, rest in DOCKERFILE)
    assert not re.search(r"index-url|find-links|trusted-host|https?://|curl|wget +-", everything)
    assert not re.search(r"(?i)key|token|secret|password", "\n".join(arguments("ARG") + arguments("ENV")))
    assert all("type=secret" in mount for rest in arguments("RUN") for mount in re.findall(r"--mount=\S+", rest))


def test_what_is_copied_is_there_and_sent() -> None:
    sources = [name for rest in arguments("COPY") if not rest.startswith("--from") for name in rest.split()[:-1]]
    assert {"jobs/", "reports/", "shortv/", "requirements.lock"} <= set(sources)
    assert all((ROOT / name).exists() and sent(name.rstrip("/")) for name in sources)
    assert sent("shortv/tiny/model/model.safetensors") and sent("jobs/lc_sweep.py")


@pytest.mark.parametrize(
    "path",
    [".git/config", "ray.token", "runs/demo/manifest.json", ".venv/bin/python", "jobs/__pycache__/a.pyc", ".env"],
)
def test_what_is_nobodys_business_is_not_sent(path: str) -> None:
    assert not sent(path)

"""The Dockerfile: not root, no index, no secret, and only what the builder is given."""

import fnmatch
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments on one line."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


DOCKERFILE = instructions((ROOT / "cluster" / "Dockerfile").read_text())


def arguments(name: str) -> list[str]:
    return [rest for found, rest in DOCKERFILE if found == name]


def sent(path: str) -> bool:
    """Whether .dockerignore lets a path through to the builder: the last line that matches it or a parent decides."""
    parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    allowed = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        rule = pattern.removeprefix("!")
        names = parents + [name for name in Path(path).parts if rule.startswith("**/")]
        if any(fnmatch.fnmatch(name, rule.removeprefix("**/")) for name in names):
            allowed = pattern.startswith("!")
    return allowed


def test_it_does_not_run_as_root() -> None:
    assert DOCKERFILE[-1][0] in ("CMD", "ENTRYPOINT")
    user = arguments("USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"--uid {user.partition(':')[0]} " in " ".join(arguments("RUN"))


def test_packages_come_by_hash_from_the_configured_index() -> None:
    installs = [part for rest in arguments("RUN") for part in rest.split("&&") if " install" in part and "pip" in part]
    assert len(installs) == 3
    assert all("--require-hashes" in part or "--no-index" in part for part in installs)
    assert "requirements.lock" in installs[1]
    everything = "\n".join(rest for _, rest in DOCKERFILE)
    assert not re.search(r"index-url|find-links|trusted-host|https?://|curl|wget +-", everything)


def test_no_secret_enters_a_layer() -> None:
    for name in ("ARG", "ENV"):
        for rest in arguments(name):
            assert not re.search(r"(?i)key|token|secret|password", rest)
    assert all("type=secret" in mount for rest in arguments("RUN") for mount in re.findall(r"--mount=\S+", rest))


def test_it_starts_without_a_network() -> None:
    variables = dict(pair.split("=", 1) for rest in arguments("ENV") for pair in rest.split())
    assert variables["HF_HUB_OFFLINE"] == "1" and variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert arguments("VOLUME") == [variables["HF_HOME"]]


def test_what_is_copied_is_there_and_sent() -> None:
    sources = [name for rest in arguments("COPY") if not rest.startswith("--from") for name in rest.split()[:-1]]
    assert {"jobs/", "reports/", "shortv/", "requirements.lock"} <= set(sources)
    for name in sources:
        assert (ROOT / name).exists() and sent(name.rstrip("/"))
    assert sent("shortv/tiny/model/model.safetensors") and sent("jobs/lc_sweep.py")


@pytest.mark.parametrize(
    "path",
    [".git/config", "ray.token", "runs/demo/manifest.json", ".venv/bin/python", "jobs/__pycache__/a.pyc", ".env"],
)
def test_what_is_nobodys_business_is_not_sent(path: str) -> None:
    assert not sent(path)

"""Install packages into the environment of this Python: `python install.py ARGUMENTS` is `pip install ARGUMENTS`.

uv does the work, because it is several times faster. uv does not read pip's settings: those that say where packages
come from are translated to uv's variables. A variable that is set already wins. If uv is missing or fails, pip
installs. As pip does, uv compiles the packages: elsewhere the first import would, and where PYTHONDONTWRITEBYTECODE is
set, as in many containers, every import (12 s of processor time for a training).
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def pip_settings() -> dict[str, str]:
    """pip's settings from its files and PIP_ variables under uv's names."""
    lines = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    found = {}
    for section in ("global.", "install.", ":env:."):  # the later one wins, as in pip
        for name, value in (line.removeprefix(section).split("=", 1) for line in lines if line.startswith(section)):
            if name in UV_NAMES:
                separator = "," if name == "find-links" else " "
                found[UV_NAMES[name]] = separator.join(ast.literal_eval(value).split())
    return found


def main() -> int:
    if not shutil.which("uv"):
        subprocess.run([*PIP, "install", "--quiet", "uv"], check=False)
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv:
        # pip takes the best version of all indexes; uv's default is the first index that has the package
        strategy = ["--index-strategy", "unsafe-best-match"]
        command = [uv, "pip", "install", "--python", sys.executable, *strategy, *sys.argv[1:]]
        environment = {"UV_COMPILE_BYTECODE": "1"} | pip_settings() | os.environ
        if subprocess.run(command, env=environment, check=False).returncode == 0:
            return 0
        print("uv failed: pip installs instead", file=sys.stderr)
    return subprocess.run([*PIP, "install", *sys.argv[1:]], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

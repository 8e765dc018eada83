"""python install.py ARGUMENTS: `pip install ARGUMENTS` into the environment of this Python, by uv, which is several times faster.

uv does not read pip's settings. Those that say where packages come from are passed on under uv's names; a UV_ variable that is
set already wins. If uv can't be had or fails, pip installs.
"""

import ast
import os
import shutil
import subprocess
import sys

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
    uv = shutil.which("uv") or shutil.which("uv", path=os.path.dirname(sys.executable))
    if uv:
        # pip takes the best version of all indexes, uv by default that of the first index that has the package
        command = [
            uv,
            "pip",
            "install",
            "--python",
            sys.executable,
            "--index-strategy",
            "unsafe-best-match",
            *sys.argv[1:],
        ]
        if subprocess.run(command, env=pip_settings() | os.environ, check=False).returncode == 0:
            return 0
        print("uv failed: pip installs instead", file=sys.stderr)
    return subprocess.run([*PIP, "install", *sys.argv[1:]], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

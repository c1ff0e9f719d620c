"""What a CI system tells every process must not change what the tests see."""

import os

for name in [name for name in os.environ if name.startswith(("GITHUB_", "OPTIMIZE_"))]:
    del os.environ[name]

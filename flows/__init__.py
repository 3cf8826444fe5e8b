"""Composition and the command line.

The environment is set before Prefect, transformers or diffusers are imported, in commands and in jobs alike.
"""

import os

from tasks import logs

# Nothing is sent anywhere.
os.environ.update(
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    PYTORCH_ENABLE_MPS_FALLBACK="1",
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no hub is asked, unless somebody says so
# Progress bars of libraries would stand between ours; and a job whose worker died has no output to print them to.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", logs.ROOT)  # a flow run's log has our records
# Each task says NO_CACHE itself: PREFECT_TASKS_DEFAULT_NO_CACHE would come too late here for a job, whose process has
# read Prefect's settings by now, and never for who imports `tasks` alone.
logs.set_up_once()

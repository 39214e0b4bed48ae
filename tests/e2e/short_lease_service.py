"""The service with claims that end soon: `python -m tests.e2e.short_lease_service`, configured like the service.

Lines of a worker that was killed are then taken by another worker within seconds. Errors of the database are tried
again sooner, too.
"""

import app.batches.batches
import app.batches.database
import app.batches.runner
from app.__main__ import main

LEASE_SECONDS = 2.0

if __name__ == "__main__":
    app.batches.batches.LEASE_SECONDS = LEASE_SECONDS  # type: ignore[assignment]
    app.batches.runner.WATCH_SECONDS = LEASE_SECONDS / 10
    app.batches.database.IDLE_SECONDS = 1
    app.batches.runner.RETRY_SECONDS = 1  # type: ignore[attr-defined] # it is imported there
    main()

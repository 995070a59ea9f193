# One image for the shop's API and its worker; docker-compose.yml says which command a service runs.
# The tag names Python's minor version and the distribution: their security fixes come with each build.
FROM python:3.13-slim-trixie AS wheels
WORKDIR /build
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY coord coord
RUN pip wheel --no-cache-dir --no-build-isolation --constraint constraints.txt --wheel-dir /wheels ".[console,metrics]" uvicorn uvloop

FROM python:3.13-slim-trixie
ENV PYTHONUNBUFFERED=1
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --no-deps /wheels/*.whl \
    && useradd --system --uid 10001 --create-home shop
WORKDIR /shop
COPY worker worker
COPY api api
# By number, so that an orchestrator can see that it is not root.
USER 10001
EXPOSE 8000
# The grace is longer than the 25 s that a request may wait for its job.
CMD ["uvicorn", "api:app", "--host", "0.0.0.0", "--port", "8000", "--timeout-graceful-shutdown", "30"]

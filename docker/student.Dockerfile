# The student worker, started by torchrun. Targets: cpu (the default) and cuda. Build from the repository's root:
#   docker build -f docker/student.Dockerfile -t logitstream-student .
# The notes on packages at the top of teacher.Dockerfile hold here too.
# checkov:skip=CKV_DOCKER_7: the argument's default has a tag
ARG PYTHON_IMAGE=python:3.11-slim

# The same stages down to `package` as in teacher.Dockerfile: the packages are installed once for both images.
FROM ${PYTHON_IMAGE} AS requirements
WORKDIR /build
COPY pyproject.toml requirements.lock ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > runtime.txt

# Only what these two files hold decides whether packages are installed anew.
FROM ${PYTHON_IMAGE} AS dependencies-cpu
WORKDIR /build
COPY --from=requirements /build/requirements.lock /build/runtime.txt ./
ARG TORCH_LOCAL=+cpu
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python -m venv --without-pip /opt/venv \
 && pip --python /opt/venv/bin/python install --no-cache-dir "$(grep '^torch==' requirements.lock)${TORCH_LOCAL}" \
      -r runtime.txt -c requirements.lock \
 && rm -rf /opt/venv/lib/python3*/site-packages/torch/include /opt/venv/lib/python3*/site-packages/torch/test

FROM ${PYTHON_IMAGE} AS dependencies-cuda
WORKDIR /build
COPY --from=requirements /build/requirements.lock /build/runtime.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python -m venv --without-pip /opt/venv \
 && PIP_FIND_LINKS='' pip --python /opt/venv/bin/python install --no-cache-dir -r runtime.txt -c requirements.lock

FROM requirements AS package
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --no-cache-dir "$(grep '^setuptools==' requirements.lock)"
COPY README.md ./
COPY logitstream logitstream
COPY student_worker student_worker
RUN pip install --no-cache-dir --no-deps --no-build-isolation --target /opt/app .

FROM ${PYTHON_IMAGE} AS runtime
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 HF_HOME=/tmp/huggingface NUMBA_CACHE_DIR=/tmp/numba
RUN install -d -o 10001 -g 10001 /secrets /cache /runs
WORKDIR /tmp
EXPOSE 29400 9100
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9100/metrics', timeout=4)"]
# Arguments are torchrun's, then `-m student_worker` and its own.
ENTRYPOINT ["torchrun"]
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="logitstream student worker" \
      org.opencontainers.image.description="Trains a student on sparse distillation targets" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"

FROM runtime AS cuda
COPY --from=dependencies-cuda /opt/venv /opt/venv
COPY --from=package /opt/app /opt/app
USER 10001:10001

FROM runtime AS cpu
COPY --from=dependencies-cpu /opt/venv /opt/venv
COPY --from=package /opt/app /opt/app
USER 10001:10001

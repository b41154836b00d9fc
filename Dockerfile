# The guard in front of a served model: docs/serving.md. On CPUs, and on NVIDIA GPUs:
#   docker build -t mllm-protector .
#   docker build -t mllm-protector:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
# No models are in the image: mount them at /models.
FROM python:3.11-slim

# PyTorch's wheels hold all of CUDA but the driver, so only the place that they come from differs.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PYTHONUNBUFFERED=1
WORKDIR /app
COPY constraints.txt ./
RUN pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY mllm_protector mllm_protector
COPY configs configs
COPY scripts scripts
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[serve]" \
    && useradd --create-home --uid 10001 guard

USER 10001
WORKDIR /home/guard
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m CMD \
    ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
# Further keys, such as url=http://host:8000/v1, go behind the name of the image.
ENTRYPOINT ["python", "/app/scripts/serve.py", "host=0.0.0.0", \
    "guard.detector=/models/detector", "guard.detoxifier=/models/detoxifier"]

# A GPU node's image: engines (vLLM) and learner ranks. It needs neither Docker nor privileges, as sandboxes run on other nodes.
# Not built by CI, which has neither a registry nor a GPU.
#
#   docker build -f docker/learner.Dockerfile -t codeworld-learner .
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
ENV DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8 PATH=/opt/venv/bin:/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates gcc git libc6-dev libnuma1 python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/venv
WORKDIR /codeworld
COPY pyproject.toml README.md LICENSE ./
COPY envs envs
COPY policy policy
COPY agents agents
COPY rl rl
COPY benchmarks benchmarks
RUN pip install --no-cache-dir -e .[train,gpu]
CMD ["bash"]

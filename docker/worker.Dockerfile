# A sandbox node's image: rollout workers and their environments. Runs privileged, as it makes namespaces, overlays and cgroups.
# Not built by CI, which reaches no registry.
#
#   docker build -f docker/worker.Dockerfile -t codeworld-worker .
FROM debian:bookworm-slim
ENV DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8 PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates docker.io gcc git libc6-dev python3 python3-venv xxd \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/venv
WORKDIR /codeworld
COPY pyproject.toml README.md LICENSE ./
COPY envs envs
COPY policy policy
COPY agents agents
COPY rl rl
COPY benchmarks benchmarks
RUN pip install --no-cache-dir -e .[train]
CMD ["bash"]

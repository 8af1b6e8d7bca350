# A root for task images where a registry can be reached; `offline-base.sh` makes its like where none can.
FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends bash coreutils diffutils findutils gawk grep patch procps python3 python3-venv sed tar xxd \
 && rm -rf /var/lib/apt/lists/*
ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin LANG=C.UTF-8
CMD ["bash"]

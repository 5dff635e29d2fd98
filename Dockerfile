# JupyterLab with difflt, on a CPU or a GPU; Binder builds it too.
#   docker build --tag difflt .
#   docker run --rm --publish 8888:8888 --volume difflt-runs:/home/jovyan/difflt/runs \
#       --volume difflt-figures:/home/jovyan/difflt/figures difflt
#   docker run --rm --gpus all --ipc host --volume /data:/data difflt ./run_all.sh --data-dir /data --out /data/difflt ...
# (/data/difflt: a folder that uid 1000 may write).
# torch as the lock has it brings CUDA's libraries, 4.5 GB, and runs on a CPU as well. For an image without them:
#   docker build --tag difflt --build-arg CPU_WHEELS=ADDRESS .
# with the address of PyTorch's CPU wheels, as its installation page has it.
FROM debian:12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG NB_USER=jovyan
ARG NB_UID=1000
RUN useradd --create-home --uid "$NB_UID" "$NB_USER" \
    && install --directory --owner "$NB_USER" /opt/difflt /home/"$NB_USER"/difflt /home/"$NB_USER"/difflt/runs
USER $NB_USER
WORKDIR /home/$NB_USER/difflt
ENV PATH=/opt/difflt/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Before the code, so that an edit installs nothing again.
COPY requirements.lock ./
ARG CPU_WHEELS=""
RUN python3 -m venv /opt/difflt \
    && lock=requirements.lock \
    && if [ -n "$CPU_WHEELS" ]; then \
        PIP_INDEX_URL="$CPU_WHEELS" pip install --no-deps $(grep -oE '^torch(vision)?==[^ ]+' requirements.lock) \
        && lock=/tmp/without-cuda.lock \
        && awk '/^[a-z]/ { keep = !/^(torch|torchvision|triton|(nvidia|cuda)-[a-z0-9-]+)==/ } keep' requirements.lock > "$lock"; \
    fi \
    && pip install --require-hashes --no-deps --requirement "$lock"

COPY --chown=$NB_UID . .
RUN pip install --no-deps --no-build-isolation --no-index --editable .

EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "--notebook-dir=notebooks"]

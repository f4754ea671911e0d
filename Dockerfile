# workflow.md says how to build and run it.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
WORKDIR /gpt2
COPY requirements.txt .
# The image's torch is in the range and stays. A system Python asks for the flag; others ignore it.
RUN pip install --no-cache-dir --break-system-packages -r requirements.txt \
    && useradd --create-home --uid 1001 gpt2 && mkdir data log && chown gpt2 data log
COPY . .
USER 1001
ENV TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
VOLUME ["/gpt2/data", "/gpt2/log"]
CMD ["torchrun", "--standalone", "--nproc_per_node=gpu", "train_gpt2.py", "--resume"]

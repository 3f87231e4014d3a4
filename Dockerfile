# The server of headstart, with the CPU build of torch. For a GPU, take torch's CUDA wheels and an image with its runtime.
#
#     docker build -t headstart .
#     docker run -p 8000:8000 -v /models:/models headstart --model /models/mine --host 0.0.0.0 --api-keys /run/secrets/keys
FROM python:3.11-slim

RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home headstart
WORKDIR /home/headstart/app
COPY pyproject.toml hatch_build.py constraints.txt README.md LICENSE NOTICE ./
COPY headstart headstart
RUN pip install --no-cache-dir --constraint constraints.txt ".[serve]"
USER headstart
EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=120s CMD python -c "from urllib.request import urlopen; urlopen('http://localhost:8000/ready')"
ENTRYPOINT ["headstart", "serve"]
CMD ["--host", "0.0.0.0", "--port", "8000"]

# gneiss for CPUs, built from this folder:
#
#   docker build --tag gneiss --build-arg GNEISS_COMMIT=$(git describe --always --dirty --exclude='*') .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" --volume gneiss-models:/models gneiss tune mine.toml
#
# This image has not been built yet: no Docker was available during development. hadolint and tests/source/images.rs check the file.
FROM rust:1.89.0-slim-bookworm AS build
ARG GNEISS_COMMIT
WORKDIR /gneiss
COPY . .
RUN cargo build --release --locked

FROM debian:12.12-slim
COPY --from=build /gneiss/target/release/gneiss /usr/local/bin/gneiss
# Models of the hub are kept in /models. Configurations, data and runs/ are in /work. Any user may write to both.
ENV HF_HOME=/models
RUN useradd --uid 10001 --create-home gneiss && install --directory --mode 1777 /models /work
VOLUME ["/models", "/work"]
WORKDIR /work
USER 10001
EXPOSE 8080
ENTRYPOINT ["gneiss"]
CMD ["--help"]

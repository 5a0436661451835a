"""A live stream in a browser; needs the extra `serve`. See docs/serving.md."""

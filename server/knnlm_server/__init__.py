"""The gRPC service of knnlm: decoding engine, service and client."""

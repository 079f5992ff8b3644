"""The shard format: `text_data.proto`, its generated module, and the stream around its messages."""

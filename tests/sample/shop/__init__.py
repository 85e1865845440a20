"""A shop: a service that knows prices, and whoever asks it finds it by its name."""

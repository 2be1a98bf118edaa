"""A local server in OpenAI's protocol: one engine thread computes, asyncio talks."""

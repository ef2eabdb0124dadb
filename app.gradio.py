"""The demo as an app of AI Studio, which runs files named ``*.gradio.py``; host and port are Gradio's own variables."""

from tools import cli, demo

if __name__ == "__main__":
    cli.run(demo.main, demo.parser(), [])

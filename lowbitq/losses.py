from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    forward: float = 0.0
    reverse: float = 0.0
    jensen_shannon: float = 0.0
    cross_entropy: float = 0.0
    temperature: float = 1.0

    def __str__(self): return "kl" if self.forward else "ce"
    @classmethod
    def parse(cls, text):
        return (
            text
            if isinstance(text, Loss)
            else {"ce": Loss(cross_entropy=1.0), "kl": Loss(forward=1.0)}[text]
        )

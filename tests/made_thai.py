"""A made table of Thai opinions, for tests of whole runs. Nothing in it was written by anybody; the
words are common, the sentences are put together by chance."""

import random

import pandas as pd

PRODUCTS = (
    "กระเป๋า รองเท้า เสื้อ โทรศัพท์ หูฟัง นาฬิกา หม้อ พัดลม ตู้เย็น โต๊ะ เก้าอี้ หมอน "
    "ผ้าห่ม แก้วน้ำ จักรยาน กล้อง ลำโพง แว่นตา ร่ม ตะกร้า ที่นอน โคมไฟ กระทะ เตารีด "
    "แปรงสีฟัน"
).split()
ASPECTS = (
    "สี ขนาด กลิ่น เสียง ราคา คุณภาพ การจัดส่ง การบริการ ผิวสัมผัส น้ำหนัก รูปทรง "
    "วัสดุ ฝีมือ กล่อง คู่มือ แบตเตอรี่ หน้าจอ ตะเข็บ สาย ฝา"
).split()
PEOPLE = "ผม ฉัน แม่ พ่อ พี่สาว น้องชาย เพื่อน คุณยาย ลูกค้า เจ้านาย ภรรยา หลาน".split()
PLACES = (
    "ที่ร้านใกล้บ้าน ในตลาดเช้า จากห้างใหญ่ ทางอินเทอร์เน็ต ที่เชียงใหม่ ที่ภูเก็ต "
    "ในซอยหน้าวัด จากร้านของเพื่อน ที่งานลดราคา หน้าสถานีรถไฟ"
).split()
TIMES = """
เมื่อวานนี้ เมื่อวันจันทร์ เดือนที่แล้ว ตอนปีใหม่ เมื่อเช้านี้ สัปดาห์ก่อน
หลังสงกรานต์ ก่อนวันหยุด เมื่อสองวันก่อน ในวันเกิด
""".split()
FILLERS = (
    "ใช้มาหลายวันแล้ว แกะกล่องเองที่บ้าน เอาไปให้ที่ทำงานดู วางไว้ในห้องครัว "
    "ลองใช้กับน้ำร้อน พกไปเที่ยวทะเล เปิดใช้ทุกเช้า เทียบกับของเก่า อ่านรีวิวมาก่อน "
    "จ่ายเงินปลายทาง รอของสามวัน ถามคนขายก่อนซื้อ"
).split()
GOOD = (
    "ดี สวย ทน คุ้มค่า น่ารัก เยี่ยม ประทับใจ แข็งแรง สะดวก เรียบร้อย รวดเร็ว นุ่ม "
    "ละเอียด สดใส ปลอดภัย ถูกใจ ใช้ง่าย มั่นคง หรูหรา สมบูรณ์"
).split()
BAD = (
    "แย่ ขาด พัง แพงเกินไป น่าเกลียด ห่วย ผิดหวัง บอบบาง ยุ่งยาก สกปรก ล่าช้า "
    "แข็งกระด้าง หยาบ หมอง อันตราย น่ารำคาญ ใช้ยาก โยกเยก ถูกหลอก บกพร่อง"
).split()
STRENGTH = "มาก จริงๆ ที่สุด ทีเดียว พอสมควร สุดๆ".split()
LABELS = ("ตำหนิ", "ชม")


def opinion(chance: random.Random, good: bool) -> str:
    "A clause that praises or complains; a quarter of them say the opposite word with a `not`."
    if chance.random() < 0.25:
        return f"{chance.choice(ASPECTS)}ไม่{chance.choice(BAD if good else GOOD)}"
    word = chance.choice(GOOD if good else BAD)
    return f"{chance.choice(ASPECTS)}{word}{chance.choice(STRENGTH) * (chance.random() < 0.4)}"


def thai_text(chance: random.Random, good: bool, contrast: float) -> str:
    """Who bought what, where and when, and what came of it. With the probability `contrast` the
    opposite opinion comes first, and the one that counts after `but`."""
    parts = [
        f"{chance.choice(PEOPLE)}ซื้อ{chance.choice(PRODUCTS)}{chance.choice(PLACES)}"
        f"{chance.choice(TIMES)}"
    ]
    parts += chance.sample(FILLERS, chance.randint(1, 3))
    chance.shuffle(parts)
    said = opinion(chance, good)
    if chance.random() < contrast:
        said = f"{opinion(chance, not good)}แต่{said}"
    elif chance.random() < 0.5:
        said = f"{said}และ{opinion(chance, good)}"
    parts.insert(chance.randint(0, len(parts)), said)
    return "".join(p + chance.choice(("", "", "และ", " ")) for p in parts).strip()


def thai_table(
    rows: int = 4000, seed: int = 0, contrast: float = 0.05, noise: float = 0.02
) -> pd.DataFrame:
    """Texts and labels, the classes in turn; a share of `noise` of the labels is wrong.

    Args:
        rows: So many.
        seed: Decides everything.
        contrast: Share of texts that say the opposite first.
        noise: Share of wrong labels.
    """
    chance = random.Random(seed)
    found = []
    for i in range(rows):
        good = bool(i % 2)
        text = thai_text(chance, good, contrast)
        found.append((text, LABELS[good ^ (chance.random() < noise)]))
    return pd.DataFrame(found, columns=["text", "label"])

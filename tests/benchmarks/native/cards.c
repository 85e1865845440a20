/* Cards: messages with holes. And the small things that all parts need: time, numbers, the end with a message. */
#include "load.h"

#include <arpa/inet.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint32_t number_at(const char *bytes) {
    uint32_t number;
    memcpy(&number, bytes, 4);
    return ntohl(number);
}

size_t line_length(const char *bytes, size_t length) {
    const char *end = memchr(bytes, '\n', length);
    return end == NULL ? 0 : (size_t)(end - bytes) + 1;
}

uint32_t port_of(uint32_t key) { return 10000 + key % 50000; }

static size_t hole_length(char kind) {
    switch (kind) {
    case 'N': return 6;
    case 'P': return 5;
    case 'C': return 10;
    case 'T': return 3;
    case 'I': return 4;
    case 'X':
    case 'S': return 4;
    case 'Q': return 2;
    default: die("a card has no hole %%%c", kind);
    }
}

void card_bytes(struct card *card, const char *bytes, size_t length) {
    if (card->length + length > CARD_BYTES)
        die("a card is too long");
    memcpy(card->bytes + card->length, bytes, length);
    card->length += length;
}

void card_add(struct card *card, const char *text, size_t length) {
    for (size_t at = 0; at < length; at++) {
        if (text[at] != '%' || text[++at] == '%') {
            card_bytes(card, text + at, 1);
            continue;
        }
        if (card->hole_count == HOLES)
            die("a card has too many holes");
        card->holes[card->hole_count++] = (struct hole){text[at], card->length};
        card_bytes(card, "0000000000", hole_length(text[at]));
    }
}

void card_text(struct card *card, const char *text) { card_add(card, text, strlen(text)); }

void card_print(struct card *card, const char *format, ...) {
    char text[CARD_BYTES];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (length < 0 || (size_t)length >= sizeof text)
        die("a card is too long");
    card_bytes(card, text, (size_t)length);
}

void card_number(struct card *card, uint32_t number, int bytes) {
    while (bytes--) {
        char byte = (char)(number >> (8 * bytes));
        card_bytes(card, &byte, 1);
    }
}

static void digits(char *out, uint32_t number, size_t width) {
    while (width--) {
        out[width] = (char)('0' + number % 10);
        number /= 10;
    }
}

static void fill(char kind, const struct asked *asked, char *out) {
    uint32_t number = 0;
    switch (kind) {
    case 'N': digits(out, asked->key, 6); return;
    case 'P': digits(out, port_of(asked->key), 5); return;
    case 'C': digits(out, asked->count, 10); return;
    case 'T': digits(out, asked->tag % SLOTS, 3); return;
    case 'I': digits(out, asked->connection, 4); return;
    case 'X': number = htonl(asked->tag); break;
    case 'S': number = htonl(2 * asked->tag + 1); break; /* clients have the odd streams */
    case 'Q': number = htonl(port_of(asked->key) << 16); break;
    }
    memcpy(out, &number, hole_length(kind));
}

size_t card_fill(const struct card *card, const struct asked *asked, char *out) {
    memcpy(out, card->bytes, card->length);
    for (int n = 0; n < card->hole_count; n++)
        fill(card->holes[n].kind, asked, out + card->holes[n].at);
    return card->length;
}

int card_matches(const struct card *card, const struct asked *asked, const char *bytes, size_t length) {
    char right[CARD_BYTES];
    card_fill(card, asked, right);
    if (length < card->length || (length > card->length && !card->open_end))
        return 0;
    return memcmp(bytes, right, card->length) == 0;
}

struct card value_card(void) {
    struct card card = {0};
    card_text(&card, VALUE);
    return card;
}

static size_t bucket(uint64_t ns) {
    int octave = 63 - __builtin_clzll(ns | 1);
    if (octave < 6)
        return (size_t)ns;
    return (size_t)(octave - 5) * 64 + ((ns >> (octave - 6)) & 63);
}

void histogram_add(struct histogram *histogram, uint64_t ns) {
    histogram->buckets[bucket(ns)]++;
    histogram->count++;
}

/* The latency in µs that `part` of all stay within: the middle of its bucket. */
double histogram_us(const struct histogram *histogram, double part) {
    uint64_t wanted = (uint64_t)(part * (double)histogram->count), seen = 0;
    for (size_t at = 0; at < 64 * 64; at++) {
        seen += histogram->buckets[at];
        if (seen <= wanted)
            continue;
        if (at < 64)
            return (double)at / 1e3;
        uint64_t width = 1ull << (at / 64 - 1);
        return ((double)((64 + at % 64) * width) + (double)width / 2) / 1e3;
    }
    return 0;
}

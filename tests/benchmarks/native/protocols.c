/* The table of protocols. */
#include "load.h"

#include <string.h>

static const struct {
    const char *name;
    void (*make)(struct protocol *);
} known[] = {
    {"floor", make_floor},
    {"regd", make_regd},
    {"redis", make_redis},
    {"memcached", make_memcached},
    {"nats", make_nats},
    {"zookeeper", make_zookeeper},
    {"etcd", make_etcd},
    {"epmd", make_epmd},
};

struct protocol *protocol_named(const char *name) {
    static struct protocol made;
    for (size_t n = 0; n < sizeof known / sizeof *known; n++)
        if (strcmp(known[n].name, name) == 0) {
            known[n].make(&made);
            made.name = known[n].name;
            if (made.request[CREATE].length == 0) {
                made.request[CREATE] = made.request[WRITE];
                made.reply[CREATE] = made.reply[WRITE];
            }
            return &made;
        }
    return NULL;
}
